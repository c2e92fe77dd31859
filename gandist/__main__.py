"""`python -m gandist VERB`, which is what `accelerate launch -m gandist VERB` starts on each process."""

from gandist.cli import main

if __name__ == "__main__":
    main()
