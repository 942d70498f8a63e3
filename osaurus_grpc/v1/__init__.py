"""Generated from protos/osaurus/v1 by protos/generate.py. Do not edit."""
