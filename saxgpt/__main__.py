"`python -m saxgpt` is `saxgpt`."
from .cli import main

if __name__ == '__main__': main()
