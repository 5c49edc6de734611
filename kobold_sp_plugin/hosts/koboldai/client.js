// Added to KoboldAI's old page: a menu that is open follows the folder, and keeps the row that is marked.
$(function () {
	var build = window.buildSPList;
	if (!build || !window.socket) return;
	function isOpen() {
		return !$("#spcontainer").hasClass("hidden");
	}
	window.buildSPList = function (rows) {
		var marked = isOpen() ? $("#splistcontent .popuplistselected").attr("name") : undefined;
		build(rows);
		$("#splistcontent .splistitem").filter(function () {
			return marked !== undefined && $(this).attr("name") === marked;
		}).trigger("click");
	};
	socket.on("softprompts", function () {
		if (isOpen()) socket.send({cmd: "splistrequest", data: ""});
	});
});
