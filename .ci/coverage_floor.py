"""Fail if the line coverage of a package is below a floor. Usage: coverage_floor.py PERCENT."""

import json
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

PACKAGES = ("kernels", "storage", "brainflow")


def main(floor: float) -> int:
    """Print the line coverage of each package and return 1 if one is below `floor` percent."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "coverage.json")
        subprocess.run([sys.executable, "-m", "coverage", "json", "-q", "-o", str(out)], check=True)
        files = json.loads(out.read_text())["files"]
    covered: dict[str, int] = defaultdict(int)
    total: dict[str, int] = defaultdict(int)
    for name, entry in files.items():
        package = Path(name).parts[0]
        covered[package] += entry["summary"]["covered_lines"]
        total[package] += entry["summary"]["num_statements"]
    failed = False
    for package in PACKAGES:
        share = 100 * covered[package] / max(total[package], 1)
        print(f"coverage {package}: {share:.1f} % of {total[package]} lines")
        failed |= share < floor
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1])))
