"""The pipeline definitions; imported from a checkout only, to compile them."""
