"""Example hospitals, and the simulation of many sites on one machine."""
