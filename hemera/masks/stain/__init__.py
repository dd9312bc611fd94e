"""The engine `stain`: nuclei from haematoxylin, membranes and their strength from DAB."""
