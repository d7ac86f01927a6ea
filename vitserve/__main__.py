"""``python -m vitserve``: the same as the command ``vitserve``."""

from vitserve.cli.main import app

if __name__ == "__main__":
    app(prog_name="vitserve")
