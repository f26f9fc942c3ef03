"""The vocabulary that server and clients share."""
