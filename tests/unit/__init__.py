"""Each module of the packages on its own; a package, so that other folders may have tests of the same names."""
