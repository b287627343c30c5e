"""Ray jobs: one file per step of the loop; Ray Data and Ray Train live here."""
