"""`python -m benchmarks ROWS --against transformers`."""

from benchmarks.run import main

main()
