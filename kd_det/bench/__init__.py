"""
What is measured beside other implementations, by `kd-det bench`.

A benchmark is one module: a docstring whose first line is its summary, `add_arguments(parser)`, and
`main(args)`, which returns what is written as JSON. Modules without these two serve the others.
"""
