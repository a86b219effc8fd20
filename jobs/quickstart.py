"""`make quickstart`: the main job on the quickstart recipe, with its wall time and peak memory.

Memory is the proportional set size (PSS) summed over the whole process tree: driver, Ray, engine and train workers.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil

RECIPE = Path(__file__).parent / "recipes" / "quickstart.cpu.toml"
SAMPLE_S = 2.0


def tree_pss(root: psutil.Process) -> int:
    """Bytes of PSS over a process and all its descendants; those that vanish meanwhile count nothing."""
    total = 0
    for process in (root, *root.children(recursive=True)):
        try:
            total += process.memory_full_info().pss
        except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
            continue
    return total


def watch(root: psutil.Process, done: threading.Event, peak: list[int]) -> None:
    """Sample until `done`, keeping the largest sum in `peak[0]`."""
    while not done.wait(SAMPLE_S):
        try:
            peak[0] = max(peak[0], tree_pss(root))
        except psutil.NoSuchProcess:
            return


def main(argv: list[str]) -> int:
    """Run the recipe with `argv` passed on; returns the job's exit code."""
    started = time.monotonic()
    job = subprocess.Popen([sys.executable, "-m", "distill_ray", "run", str(RECIPE), *argv])
    signal.signal(signal.SIGTERM, lambda number, _: job.send_signal(number))
    done, peak = threading.Event(), [0]
    sampler = threading.Thread(target=watch, args=(psutil.Process(job.pid), done, peak), daemon=True)
    sampler.start()
    while True:
        try:
            code = job.wait()
            break
        except KeyboardInterrupt:
            continue  # the job got the same signal and stops by itself
    done.set()
    sampler.join()
    print(f"took    {time.monotonic() - started:.0f} s, peak memory {peak[0] / 2**30:.2f} GiB (PSS of all processes)")
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
