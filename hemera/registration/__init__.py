"""Registration of HER2 onto H&E: displacement, engine, certificate, landmarks, transfer."""
