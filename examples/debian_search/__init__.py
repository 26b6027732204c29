"""Search among Debian's packages: what a package is in a line finds what it is in a paragraph."""
