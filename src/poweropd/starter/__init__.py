"""`poweropd init`: looks at a file of prompts and writes a commented recipe for it."""
