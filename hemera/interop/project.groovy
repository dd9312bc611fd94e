// Builds a QuPath project of the slides in slides.json, with the objects of their GeoJSON files.
//
// In QuPath 0.5 or later: Automate > Script editor, open this file, Run. Without a window:
//     QuPath script project.groovy
// Where the folder was moved, its path follows as the argument: --args FOLDER

import java.awt.image.BufferedImage
import groovy.json.JsonSlurper
import qupath.lib.gui.commands.ProjectCommands
import qupath.lib.images.ImageData
import qupath.lib.images.servers.ImageServerProvider
import qupath.lib.io.PathIO
import qupath.lib.projects.Projects
import qupath.lib.scripting.QP

def folder = new File(args ? args[0] : '@FOLDER@')
def target = new File(folder, 'project')
if (!target.mkdirs()) {
    throw new IllegalStateException("${target}: exists; remove it first")
}
def project = Projects.createProject(target, BufferedImage.class)

new JsonSlurper().parse(new File(folder, 'slides.json')).each { slide ->
    def support = ImageServerProvider.getPreferredUriImageSupport(BufferedImage.class, new File(slide.image).toURI().toString())
    if (support == null || support.builders.isEmpty()) {
        println "${slide.image}: QuPath cannot read it; left out"
        return
    }
    def entry = project.addImage(support.builders.get(0))
    entry.setImageName(slide.objects.replace('.geojson', ''))
    def data = entry.readImageData()
    data.setImageType(slide.stain == 'he' ? ImageData.ImageType.BRIGHTFIELD_H_E : ImageData.ImageType.BRIGHTFIELD_H_DAB)
    if (slide.mpp != null) {
        QP.setPixelSizeMicrons(data, slide.mpp, slide.mpp, Double.NaN)
    }
    data.getHierarchy().addObjects(PathIO.readObjects(new File(folder, slide.objects)))
    entry.saveImageData(data)
    entry.setThumbnail(ProjectCommands.getThumbnailRGB(data.getServer()))
    println "${slide.objects}: ${data.getHierarchy().getAllObjects(false).size()} objects"
}
project.syncChanges()
println "${target}: open its project.qpproj in QuPath"
