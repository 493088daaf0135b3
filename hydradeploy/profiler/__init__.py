"""How long artifacts take on this device, what they occupy, and under which conditions that was measured."""
