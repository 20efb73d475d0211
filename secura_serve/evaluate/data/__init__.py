"""Where the rows of the offline tasks come from: one file per source, no network anywhere.

A source gives ``train``, ``validation`` and ``test`` rows, the same ones on every machine and
never one prompt in two splits. Texts with rights of their own are read from the package that
carries them and are not part of this repository.
"""
