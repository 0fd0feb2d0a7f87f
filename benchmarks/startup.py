"""Starting: the command's help, the import, and the demo, each as a new process. Limit: Python doing nothing."""

import subprocess
import sys
import tempfile
from functools import partial

from benchmarks.measure import Case, Options, Work

HELP = ("-c", "import sys; from dualtoken.cli import main; main(['--help'])")
DEMO = "import sys; from dualtoken.cli import main; sys.exit(main(['demo', '--output', sys.argv[1]]))"


def cases(options: Options) -> list[Case]:
    """What people wait for first."""
    nothing = Case("start", "Python doing nothing", "limit", partial(process, "-c", "pass"))
    made = [Case("start", "dualtoken --help", "ours", partial(process, *HELP)), nothing]
    if options.tiny:
        return made
    made.insert(1, Case("start", "import dualtoken", "reference", partial(process, "-c", "import dualtoken")))
    made.append(Case("first steps", "dualtoken demo", "ours", demo, rounds=1))
    return made


def process(*arguments: str) -> Work:
    return Work(lambda: subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL))


def demo() -> Work:
    def run() -> None:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-c", DEMO, folder]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    return Work(run)
