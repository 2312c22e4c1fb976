"""A conformance suite for any vfio-user server: a black-box client with cases, client profiles and reports.

Every byte that is sent is packed here, with `struct`, and compared with golden vectors; the codec of this project is
not used (only its table of numbers is), so that a mistake in it cannot hide itself.
"""
