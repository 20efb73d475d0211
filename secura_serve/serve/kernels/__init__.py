"""The adapter step y + C·(U_slot·(y − b)[rows]), once per kind of device."""
