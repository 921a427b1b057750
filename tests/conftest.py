"""One thread for every test and every process that a test starts.

Several threads on few cores wait for each other (beside another process a step of a small model takes many
times as long), and sums of one thread are the same on every machine.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before anything imports torch or numpy
