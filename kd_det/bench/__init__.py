"""What is measured beside other implementations: one module per benchmark, each with its `main`."""
