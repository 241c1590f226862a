"""Recipes of training runs, run and reported: the library behind `kd-det compare`."""
