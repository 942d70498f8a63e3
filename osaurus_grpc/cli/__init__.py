"""The command line: osaurus serve, pull, list, show, rm, ps, run, status, stop, doctor, version."""
