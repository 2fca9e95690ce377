"""What imports cost, and who needs them.

``watch`` times each import of this process, ``sums`` adds them up. ``needs`` reads from a handler's file which of its imports
a restored start needs, ``costs`` measures them in processes of their own (``child``).
"""
