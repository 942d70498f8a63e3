"""Speed, as ratios against a baseline taken in the same run. Not part of the test suite."""
