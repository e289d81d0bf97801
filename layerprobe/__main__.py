"""`python -m layerprobe` is the command line."""

from layerprobe.cli.main import main

if __name__ == "__main__":
    main()
