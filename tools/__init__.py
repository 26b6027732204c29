"""Developer scripts; never imported by the packages."""
