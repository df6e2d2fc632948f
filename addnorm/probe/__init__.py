"""The X-ray: what a forward and a backward pass carry through the connections of a network."""
