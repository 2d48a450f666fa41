"""Cosmic chronometers: 32 published measurements of the Hubble parameter H(z) from the ages of galaxies, with sources.

The covariance shared by some of them is not included. Published tables differ in a few rows: see `NOTES`.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

__all__ = ["NOTES", "ROWS", "SOURCES", "Chronometers", "chronometers"]

#: Papers by the keys used in `ROWS`.
SOURCES = {
    "simon2005": "Simon, Verde, Jimenez 2005, Phys. Rev. D 71, 123001",
    "stern2010": "Stern et al. 2010, J. Cosmol. Astropart. Phys. 02, 008",
    "moresco2012": "Moresco et al. 2012, J. Cosmol. Astropart. Phys. 08, 006",
    "zhang2014": "Zhang et al. 2014, Res. Astron. Astrophys. 14, 1221",
    "moresco2015": "Moresco 2015, Mon. Not. R. Astron. Soc. Lett. 450, L16",
    "moresco2016": "Moresco et al. 2016, J. Cosmol. Astropart. Phys. 05, 014",
    "ratsimbazafy2017": "Ratsimbazafy et al. 2017, Mon. Not. R. Astron. Soc. 467, 3239",
    "borghi2022": "Borghi, Moresco, Cimatti 2022, Astrophys. J. Lett. 928, L4",
}

#: Redshift, H and its standard deviation in km/s/Mpc, and the source.
ROWS: tuple[tuple[float, float, float, str], ...] = (
    (0.07, 69.0, 19.6, "zhang2014"),
    (0.09, 69.0, 12.0, "simon2005"),
    (0.12, 68.6, 26.2, "zhang2014"),
    (0.17, 83.0, 8.0, "simon2005"),
    (0.179, 75.0, 4.0, "moresco2012"),
    (0.199, 75.0, 5.0, "moresco2012"),
    (0.2, 72.9, 29.6, "zhang2014"),
    (0.27, 77.0, 14.0, "simon2005"),
    (0.28, 88.8, 36.6, "zhang2014"),
    (0.352, 83.0, 14.0, "moresco2012"),
    (0.38, 83.0, 13.5, "moresco2016"),
    (0.4, 95.0, 17.0, "simon2005"),
    (0.4004, 77.0, 10.2, "moresco2016"),
    (0.425, 87.1, 11.2, "moresco2016"),
    (0.445, 92.8, 12.9, "moresco2016"),
    (0.47, 89.0, 49.6, "ratsimbazafy2017"),
    (0.4783, 80.9, 9.0, "moresco2016"),
    (0.48, 97.0, 62.0, "stern2010"),
    (0.593, 104.0, 13.0, "moresco2012"),
    (0.68, 92.0, 8.0, "moresco2012"),
    (0.75, 98.8, 33.6, "borghi2022"),
    (0.781, 105.0, 12.0, "moresco2012"),
    (0.875, 125.0, 17.0, "moresco2012"),
    (0.88, 90.0, 40.0, "stern2010"),
    (0.9, 117.0, 23.0, "simon2005"),
    (1.037, 154.0, 20.0, "moresco2012"),
    (1.3, 168.0, 17.0, "simon2005"),
    (1.363, 160.0, 33.6, "moresco2015"),
    (1.43, 177.0, 18.0, "simon2005"),
    (1.53, 140.0, 14.0, "simon2005"),
    (1.75, 202.0, 40.0, "simon2005"),
    (1.965, 186.5, 50.4, "moresco2015"),
)

#: Differences between published tables, by redshift.
NOTES = {
    0.09: "first published by Jimenez et al. 2003",
    0.38: "z also printed 0.3802",
    0.425: "z also printed 0.4247",
    0.445: "z also printed 0.4497",
    0.47: "sigma also printed 50; 34 is the statistical part only",
}


class Chronometers(NamedTuple):
    """Columns of :data:`ROWS`, each (32,)."""

    z: np.ndarray
    H: np.ndarray  # km/s/Mpc
    sigma: np.ndarray  # km/s/Mpc


def chronometers() -> Chronometers:
    """The rows as float64 arrays, sorted by redshift."""
    z, H, sigma = np.array([row[:3] for row in ROWS], dtype=np.float64).T
    return Chronometers(z, H, sigma)
