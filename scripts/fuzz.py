"""Fuzz the parsers: bytes that are changed again and again, led by which branches they reach.

    python scripts/fuzz.py --seconds 60             every parser of tests/parsers.py, one by one
    python scripts/fuzz.py --seconds 60 zip idx     some of them
    python scripts/fuzz.py --repeat zip FILE        give a file that was found to its parser again

The work is done by Atheris (libFuzzer). What reaches something new is kept in `fuzz/<parser>/`,
from where the next run goes on; what makes a parser fail, hang or take too much memory is written
to `fuzz/<parser>-…`, and the way to repeat it is printed. Ends with 1 if there was anything.
"""

import argparse
import hashlib
import os
import re
import resource
import sys
import traceback
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY / "tests"))

MOST_MEMORY_MB = 1500
"""What the process may take on top of what PyTorch and the rest do when nothing is parsed yet."""
SLOWEST_SECONDS = 20
MOST_INPUT_BYTES = 300_000
# Libraries that parse for us, in Python, whose branches lead the fuzzer, too.
LED_BY = ["capsrun", "zipfile", "gzip", "json", "yaml", "omegaconf", "PIL", "pickle", "pickletools"]


def main() -> int:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("targets", nargs="*", help="parsers (default: all)")
    parser.add_argument("--seconds", type=int, default=60, help="for each parser")
    parser.add_argument("--out", type=Path, default=REPOSITORY / "fuzz", help="folder to write to")
    parser.add_argument("--repeat", action="store_true", help="TARGET FILE: only that")
    options = parser.parse_args()
    if options.repeat:
        from parsers import check

        check(options.targets[0], Path(options.targets[1]).read_bytes())
        print("nothing happened that should not")
        return 0

    import atheris

    with atheris.instrument_imports(include=LED_BY, enable_loader_override=False):
        import parsers
    unknown = sorted(set(options.targets) - parsers.TARGETS.keys())
    if unknown:
        print(f"there is no parser {', '.join(unknown)}; there are: {', '.join(parsers.TARGETS)}")
        return 2
    parsers.folder()  # made here, so that it is deleted in the end
    names = options.targets or list(parsers.TARGETS)
    failed = [name for name in names if not fuzz(name, options.out, options.seconds)]
    return int(bool(failed))


def fuzz(name: str, out: Path, seconds: int) -> bool:
    """Fuzz one parser in a process of its own, and say what came of it; whether it was nothing."""
    out.mkdir(parents=True, exist_ok=True)
    log_file = out / f"{name}.log"
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        with open(log_file, "wb") as stream:
            os.dup2(stream.fileno(), 1)
            os.dup2(stream.fileno(), 2)
        try:
            fuzz_here(name, out, seconds)  # which ends the process
        except BaseException:
            traceback.print_exc()
        os._exit(1)
    _, status = os.waitpid(child, 0)
    log = log_file.read_text(errors="replace")
    inputs = re.findall(r"number_of_executed_units: (\d+)", log)
    branches = re.findall(r"cov: (\d+)", log)
    if status == 0 and inputs:
        print(f"{name}: {int(inputs[-1]):,} inputs, {branches[-1]} branches, nothing found")
        return True
    print(log[-3000:])
    for file in re.findall(r"Test unit written to (\S+)", log):
        print(f"{name}: repeat with  {sys.executable} scripts/fuzz.py --repeat {name} {file}")
    print(f"{name}: FAILED", flush=True)
    return False


def fuzz_here(name: str, out: Path, seconds: int) -> None:
    """Fuzz one parser in this process, and end it."""
    import atheris
    import parsers
    import torch

    torch.set_num_threads(1)  # those of before the fork are not there any more
    seeds = out / name
    seeds.mkdir(exist_ok=True)
    for number, content in enumerate(parsers.TARGETS[name].seeds()):
        (seeds / f"seed{number}").write_bytes(content)
        parsers.check(name, content)  # what is imported late is imported now
    limit_memory()
    words = [
        f"-max_total_time={seconds}",
        f"-timeout={SLOWEST_SECONDS}",
        f"-max_len={MOST_INPUT_BYTES}",
        f"-artifact_prefix={out}/{name}-",
        "-rss_limit_mb=0",  # the limit is set here
        "-print_final_stats=1",
        str(seeds),
    ]

    def check(content: bytes) -> None:
        try:
            parsers.check(name, content)
        except BaseException:
            file = out / f"{name}-{hashlib.sha256(content).hexdigest()[:12]}"
            file.write_bytes(content)
            print(f"Test unit written to {file}", flush=True)  # as libFuzzer says after a hang
            raise

    atheris.Setup([sys.argv[0], *words], check)
    atheris.Fuzz()


def limit_memory() -> None:
    """Let the process ask for no more memory than `MOST_MEMORY_MB` on top of what it has."""
    status = Path("/proc/self/status").read_text()
    has_kb = int(re.search(r"VmSize:\s+(\d+) kB", status)[1])  # type: ignore[index]
    limit = has_kb * 1024 + MOST_MEMORY_MB * 1_000_000
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


if __name__ == "__main__":
    sys.exit(main())
