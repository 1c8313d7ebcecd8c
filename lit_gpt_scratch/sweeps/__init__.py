"""Many runs of ``fit`` from one file: what varies, which run is whose, and what may be concluded from them."""
