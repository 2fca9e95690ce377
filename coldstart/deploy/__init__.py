"""Deploying a handler's file: what the file says, the image it needs, and the platforms' management APIs.

Nothing here is on a worker's start path.
"""
