"""`python -m fastvlm`: the same as `fastvlm`."""

from .cli.start import main

if __name__ == "__main__":
    main()
