import os
import subprocess
import sys
import time

from brainflow.benchmarks.fresh import in_a_fresh_process


def sleep_and_say_who(path):
    with open(path, "w") as file:
        file.write(str(os.getpid()))
    time.sleep(120)


def test_it_is_another_process():
    assert in_a_fresh_process(os.getpid) != os.getpid()


def test_a_killed_run_leaves_no_worker_that_computes_on(tmp_path):
    path = tmp_path / "pid"
    code = (
        "from brainflow.benchmarks.fresh import in_a_fresh_process\n"
        "from test_fresh import sleep_and_say_who\n"
        f"if __name__ == '__main__': in_a_fresh_process(sleep_and_say_who, {str(path)!r})"
    )
    (tmp_path / "run.py").write_text(code)
    env = {**os.environ, "PYTHONPATH": os.path.dirname(__file__)}
    run = subprocess.Popen([sys.executable, str(tmp_path / "run.py")], env=env)
    try:
        until(lambda: path.exists() and path.read_text())
    finally:
        run.kill()
        run.wait()
    worker = int(path.read_text())
    until(lambda: not alive(worker))


def until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"  # dead, but nobody has asked for its code
    except FileNotFoundError:
        return False
