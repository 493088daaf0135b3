"""A device at the other end of ssh: the bundle goes there, what is measured comes back. See docs/remote.md."""
