"""Registration of H&E and HER2: displacement, certificate, engine."""
