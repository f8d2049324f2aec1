"""`python -m llm_service` starts the server; `... migrate` brings its schema up to date."""

from llm_service.cli import main

if __name__ == "__main__":
    main()
