"""The `xcon` command: one name for all entry points, `xcon pretrain ...` as `python -m xcon.pretrain ...`."""

import runpy
import sys

COMMANDS = {
    "pretrain": "xcon.pretrain",
    "finetune": "xcon.finetune",
    "predict": "xcon.predict",
    "prior": "xcon.prior",
    "report": "xcon.report",
    "scale": "xcon.scale",
    "map": "xcon.maps",
    "reproduce": "xcon.reproduce",
    "demo": "xcon.demo",
    "prefetch": "xcon.prefetch",
    "doctor": "xcon.doctor",
}


def main() -> None:
    """Runs the entry point that is named first."""
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name in ("-h", "--help"):
        sys.stdout.write(f"usage: xcon COMMAND ...\ncommands: {', '.join(COMMANDS)}; each has --help\n")
        return
    if name not in COMMANDS:
        sys.stderr.write(f"xcon: no command {name!r}: one of {', '.join(COMMANDS)}\n")
        raise SystemExit(2)
    sys.argv = [f"xcon {name}", *sys.argv[2:]]
    # As `python -m` does: tyro finds the help texts in the source of what is __main__.
    runpy.run_module(COMMANDS[name], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
