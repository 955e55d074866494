"""`python -m minipeft.checks grade FILE_OR_FOLDER …`: grade students' notebooks. How is told in `grading.py`."""

import argparse
import math
import sys


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m minipeft.checks")
    command = parser.add_subparsers(dest="command", required=True).add_parser("grade", help="grade students' notebooks")
    command.add_argument("paths", nargs="+", metavar="FILE_OR_FOLDER")
    command.add_argument("--out", default="grades", metavar="DIR", help="where the grades go (default: grades)")
    command.add_argument("--time-limit", type=float, default=10.0, metavar="S", help="seconds of processor time for one exercise (default: 10)")
    command.add_argument("--memory-limit", type=int, default=2048, metavar="MB", help="for one exercise (default: 2048)")
    args = parser.parse_args(argv)
    if sys.platform == "win32":
        parser.error("grading needs Linux or macOS; on Windows, use WSL")
    if not 0 < args.time_limit < math.inf or args.memory_limit <= 0:
        parser.error("the limits must be numbers above zero")
    from minipeft.checks import grading

    try:
        grades = grading.grade(args.paths, args.out, seconds=args.time_limit, megabytes=args.memory_limit)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\ninterrupted; what is judged is in {args.out}, and the same command goes on from there", file=sys.stderr)
        return 130
    for file in dict.fromkeys(g.file for g in grades):
        own = [g for g in grades if g.file == file]
        reason = f"  {own[0].why}" if own[0].status == "unreadable" else ""
        print(f"{sum(g.points for g in own):4} of {sum(g.of for g in own):3}  {file}{reason}")
    print(f"reasons: {args.out}/exercises.csv, {args.out}/grades.json; points: {args.out}/points.csv")
    return 0


if __name__ == "__main__":
    sys.exit(main())
