"""``python -m lightning_rectify``: the same command line as the ``lightning-rectify`` script."""

from lightning_rectify.cli import main

if __name__ == "__main__":
    main()
