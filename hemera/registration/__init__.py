"""Registration of HER2 onto H&E: displacements, certificate, engine, landmarks, warping."""
