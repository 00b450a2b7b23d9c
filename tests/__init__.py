"""Tests of `rtp_wrap`; a package, so that worker processes can import its modules."""
