"""Carriers under test: a hand that answers them, and QEMUs without a guest that migrate by plain `migrate`."""
