"""What a cold start costs: the same event answered by fresh processes in up to four scenarios, with their statistics.

``target`` says what is measured, ``trial`` runs one process, ``rounds`` runs them all, ``summary`` and ``agreement``
are the arithmetic, ``report`` writes it down. ``plain.py`` is a script and never imported here: the ordinary way is
started with it, and it knows nothing of coldstart.
"""
