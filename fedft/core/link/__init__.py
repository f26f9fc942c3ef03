"""How a server and the sites of a deployment talk: message types, framing, identities.

Both ends import this and neither imports the other. ``link.proto`` is the whole conversation.
"""
