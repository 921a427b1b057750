"""Tests in interpreted/ run in a process of their own, with TRITON_INTERPRET=1 set from its start."""

import os

collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["interpreted"]
