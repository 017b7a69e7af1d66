"""`python -m specmpc_cli`."""

from specmpc_cli.cli.app import app

if __name__ == "__main__":
    app(prog_name="specmpc")
