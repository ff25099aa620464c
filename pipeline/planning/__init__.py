"""`braid plan` and `braid bench plan`: plans, traffic, measurements."""
