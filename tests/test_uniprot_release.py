"""Fetching a release of UniRef50 (metalink, archive, record) from a server laid out like UniProt's."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import random
import shutil
import tarfile
from pathlib import Path
from types import SimpleNamespace
from xml.sax.saxutils import escape, quoteattr

import pytest

from bionemo_esm.data import uniprot_release as release_archive
from bionemo_esm.data.download import ReleaseError
from bionemo_esm.data.fasta import read_fasta
from bionemo_esm.data.uniprot_release import FetchedRelease, extract_fasta, fetch_release, locate_release
from release_server import CONTENT, MD5, Reply, Server, names

pytestmark = pytest.mark.usefixtures("pauses")


def tar(files: dict[str, bytes], mode: str = "w", kind: bytes = tarfile.REGTYPE) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode=mode) as archive:  # type: ignore[call-overload]
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/passwd"
            member.size = len(content) if kind == tarfile.REGTYPE else 0
            archive.addfile(member, io.BytesIO(content))
    return packed.getvalue()


def metalink(version: str, files: dict[str, bytes], **changes: str) -> bytes:
    entries = "".join(
        f'<file name="{name}"><size>{changes.get("size", str(len(content)))}</size><verification>'
        f'<hash type="md5">{changes.get("md5", hashlib.md5(content).hexdigest())}</hash></verification>'
        f'<resources><url type="ftp">ftp://ftp.example.org/{name}</url></resources></file>'
        for name, content in files.items()
    )
    head = '<?xml version="1.0" encoding="UTF-8"?>' + changes.get("doctype", "")
    body = f"<version>{version}</version><files>{entries}</files>"
    return f'{head}<metalink version="3.0" xmlns="http://www.metalinker.org/">{body}</metalink>'.encode()


HEADERS = {  # matches the entries of the XML below
    "UniRef50_P0CG48": "Polyubiquitin-C & <its> \xe9 n=3 Tax=Eukaryota TaxID=2759 RepID=UBC_HUMAN",
    "UniRef50_P01542": "Crambin n=1 Tax=Crambe hispanica TaxID=3721 RepID=CRAM_CRAAB",
}
SEQUENCES = {
    "UniRef50_P0CG48": "MQIFVKTLTGKTITLEVEPSDTIENVKAKIQDKEGIPPDQQRLIFAGKQLEDGRTLSDYNIQKESTLHLVLRLRGG",
    "UniRef50_P01542": "TTCCPSIVARSNFNVCRLPGTPEALCATYTGCIIIPGATCPGDYAN",
}


def uniref_xml(doctype: str = "", length: int = 0) -> bytes:
    """Return UniRef50 XML of two clusters, the first with several members; `length` is added to the stated length."""
    text = f'<?xml version="1.0" encoding="ISO-8859-1" ?>\n{doctype}'
    text += '<UniRef50 xmlns="http://uniprot.org/uniref" \n releaseDate="2022-12-14" version="2022_05"> \n'
    for key, header in HEADERS.items():
        name, _, rest = header.partition(" n=")
        count, _, rest = rest.partition(" Tax=")
        taxon, _, rest = rest.partition(" TaxID=")
        number, _, representative = rest.partition(" RepID=")
        residues = SEQUENCES[key]
        # Releases before 2019_09 wrap sequences.
        wrapped = "\n".join(residues[at : at + 60] for at in range(0, len(residues), 60))
        text += f'<entry id="{key}" updated="2022-12-14">\n<name>Cluster: {escape(name)}</name>\n'
        for kind, value in (("member count", count), ("common taxon", taxon), ("common taxon ID", number)):
            text += f'<property type="{kind}" value={quoteattr(value)}/>\n'
        member = '<dbReference type="UniProtKB ID" id="{}">\n<property type="length" value="9"/>\n</dbReference>\n'
        text += f"<representativeMember>\n{member.format(representative)}"
        text += f'<sequence length="{len(residues) + length}" checksum="0">\n{wrapped}\n</sequence>\n'
        text += "</representativeMember>\n"
        text += f"<member>\n{member.format('OTHER_MOUSE')}</member>\n" * (int(count) - 1) + "</entry>\n"
    return f"{text}</UniRef50>\n".encode("latin-1")


def sample_xml() -> bytes:
    """Return the shipped proteins as clusters of one member each, with as many properties as UniRef has."""
    numbers = random.Random(1)
    text = "<UniRef50>\n"
    for record in read_fasta(Path(release_archive.__file__).parent / "sample" / "train.fasta.gz"):
        residues, name, taxon = record.sequence.decode(), "Uncharacterized protein", "Homo sapiens"
        accession, checksum = f"A0A{numbers.randbytes(4).hex()[:7].upper()}", numbers.randbytes(8).hex().upper()
        text += f'<entry id="UniRef50_{accession}" updated="2022-12-14">\n<name>Cluster: {name}</name>\n'
        for kind, value in (("member count", "1"), ("common taxon", taxon), ("common taxon ID", "9606")):
            text += f'<property type="{kind}" value="{value}"/>\n'
        text += f'<representativeMember>\n<dbReference type="UniProtKB ID" id="{accession}_HUMAN">\n'
        properties = {
            "UniProtKB accession": accession,
            "UniParc ID": f"UPI000{numbers.randbytes(4).hex()[:7].upper()}",
            "UniRef100 ID": f"UniRef100_{accession}",
            "UniRef90 ID": f"UniRef90_{accession}",
            "protein name": name,
            "source organism": taxon,
            "NCBI taxonomy": "9606",
            "length": str(len(residues)),
            "isSeed": "true",
        }
        text += "".join(f'<property type="{kind}" value="{value}"/>\n' for kind, value in properties.items())
        text += f'</dbReference>\n<sequence length="{len(residues)}" checksum="{checksum}">{residues}</sequence>\n'
        text += "</representativeMember>\n</entry>\n"
    return f"{text}</UniRef50>\n".encode()


XML = gzip.compress(uniref_xml())
INNER = tar({"README": b"", "uniref50.release_note": b"UniRef50", "uniref50.xml.gz": XML})
ARCHIVE = tar({"uniref100.tar": b"\0" * 30_000, "uniref90.tar": b"\0" * 20_000, "uniref50.tar": INNER}, "w:gz")
OLD = "/previous_releases/release-2022_05/uniref"
NOW = "/uniref/uniref50"


@pytest.fixture
def uniprot(server: Server) -> Server:
    """A server laid out like UniProt's: 2024_06 is current, 2022_05 archived."""
    server.files = {
        f"{NOW}/uniref50.fasta.gz": CONTENT,
        f"{NOW}/RELEASE.metalink": metalink("2024_06", {"uniref50.xml.gz": b"xml", "uniref50.fasta.gz": CONTENT}),
        f"{OLD}/uniref2022_05.tar.gz": ARCHIVE,
        f"{OLD}/RELEASE.metalink": metalink("2022_05", {"README": b"read", "uniref2022_05.tar.gz": ARCHIVE}),
    }
    return server


def read(path: Path) -> dict[str, tuple[str, str]]:
    return {record.id: (record.header, record.sequence.decode()) for record in read_fasta(path)}


EXPECTED = {key: (f"{key} {HEADERS[key]}", SEQUENCES[key]) for key in HEADERS}


@pytest.mark.parametrize("name", ["current", "2024_06"])
def test_current_release_gets_the_version_in_its_metalink(uniprot: Server, tmp_path: Path, name: str) -> None:
    fetched = fetch_release(name, tmp_path / "data", base_url=uniprot.url)
    path = tmp_path / "data" / "uniref50_2024_06.fasta.gz"
    assert fetched == FetchedRelease(path, "2024_06", f"{uniprot.url}{NOW}/uniref50.fasta.gz", MD5, "CC BY 4.0")
    assert path.read_bytes() == CONTENT
    assert names(path.parent) == [path.name, "uniref50_2024_06.json"]


def test_archived_release_is_converted_to_fasta_with_uniref_headers(uniprot: Server, tmp_path: Path) -> None:
    fetched = fetch_release("2022_05", tmp_path, base_url=f"{uniprot.url}/")
    md5 = hashlib.md5(ARCHIVE).hexdigest()
    path = tmp_path / "uniref50_2022_05.fasta.gz"
    assert fetched == FetchedRelease(path, "2022_05", f"{uniprot.url}{OLD}/uniref2022_05.tar.gz", md5, "CC BY 4.0")
    assert read(path) == EXPECTED
    assert max(map(len, gzip.decompress(path.read_bytes()).split(b"\n")[1:3])) == 60
    assert names(tmp_path) == [path.name, "uniref50_2022_05.json"]  # the archive was deleted


def test_progress_covers_the_download_and_then_the_archive(uniprot: Server, tmp_path: Path) -> None:
    seen: list[tuple[int, int | None]] = []
    archive = tar({"uniref90.tar": random.Random(1).randbytes(300_000), "uniref50.tar": INNER}, "w:gz")
    uniprot.files[f"{OLD}/uniref2022_05.tar.gz"] = archive
    uniprot.files[f"{OLD}/RELEASE.metalink"] = metalink("2022_05", {"uniref2022_05.tar.gz": archive})
    fetch_release("2022_05", tmp_path, lambda *now: seen.append(now), uniprot.url)
    assert {total for _, total in seen} == {len(archive)}
    done = [now for now, _ in seen]
    again = next(at for at in range(1, len(done)) if done[at] < done[at - 1])
    for part in (done[:again], done[again:]):
        assert part == sorted(part)
        assert part[-1] == len(archive)
        assert len(part) > 3


def test_fetched_release_needs_no_server(uniprot: Server, tmp_path: Path) -> None:
    first = fetch_release("2022_05", tmp_path, base_url=uniprot.url)
    uniprot.seen.clear()
    assert fetch_release("2022_05", tmp_path, base_url=uniprot.url) == first
    assert uniprot.seen == []
    fetch_release("current", tmp_path, base_url=uniprot.url)
    uniprot.seen.clear()
    fetch_release("current", tmp_path, base_url=uniprot.url)
    assert [path for path, *_ in uniprot.seen] == [f"{NOW}/RELEASE.metalink"]


def test_damaged_release_is_fetched_again(uniprot: Server, tmp_path: Path) -> None:
    path = fetch_release("2022_05", tmp_path, base_url=uniprot.url).path
    good = path.read_bytes()
    path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    assert fetch_release("2022_05", tmp_path, base_url=uniprot.url).path.read_bytes() == good


def test_record_with_a_path_elsewhere_is_ignored(uniprot: Server, tmp_path: Path) -> None:
    path = fetch_release("2022_05", tmp_path / "data", base_url=uniprot.url).path
    record = json.loads((path.parent / "uniref50_2022_05.json").read_text())
    (tmp_path / path.name).write_bytes(path.read_bytes())
    for elsewhere in (str(tmp_path / path.name), f"../{path.name}", 7):
        (path.parent / "uniref50_2022_05.json").write_text(json.dumps(record | {"path": elsewhere}))
        uniprot.seen.clear()
        assert fetch_release("2022_05", path.parent, base_url=uniprot.url).path == path
        assert uniprot.seen


def test_interrupted_archive_download_is_resumed(uniprot: Server, tmp_path: Path) -> None:
    place = f"{OLD}/uniref2022_05.tar.gz"
    uniprot.fail(Reply(drop_after=len(ARCHIVE) // 2), path=place)
    assert read(fetch_release("2022_05", tmp_path, base_url=uniprot.url).path) == EXPECTED
    assert [status for path, _, status in uniprot.seen if path == place] == [200, 206]


@pytest.mark.parametrize(
    "name", ["2022", "2022_5", "../2022_05", "2022_05/..", "", "latest", "2022_05\n", "２０２２_05"]
)
def test_invalid_release_name_is_rejected_before_any_request(uniprot: Server, tmp_path: Path, name: str) -> None:
    with pytest.raises(ReleaseError, match="give a number such as 2022_05, or 'current'"):
        fetch_release(name, tmp_path, base_url=uniprot.url)
    assert uniprot.seen == []


def test_missing_release_is_an_error(uniprot: Server) -> None:
    with pytest.raises(ReleaseError, match=r"release-1999_01/.*HTTP status 404; check that there is such a release"):
        locate_release("1999_01", base_url=uniprot.url)


def test_archive_of_another_release_is_rejected(uniprot: Server) -> None:
    uniprot.files[f"{OLD}/RELEASE.metalink"] = metalink("2022_04", {"uniref2022_05.tar.gz": ARCHIVE})
    with pytest.raises(ReleaseError, match="of release 2022_04, not 2022_05"):
        locate_release("2022_05", base_url=uniprot.url)


LAUGHS = '<!DOCTYPE metalink [<!ENTITY a "ha"><!ENTITY b "&a;&a;&a;&a;">]>'


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (metalink("&b;", {"uniref50.fasta.gz": CONTENT}, doctype=LAUGHS), "it has a DTD"),
        (metalink("2024_06", {"uniref50.fasta.gz": b""}, doctype='<!DOCTYPE a SYSTEM "file:///etc/passwd">'), "a DTD"),
        (metalink("2024_06", {"uniref50.fasta.gz": CONTENT})[:-5], "cannot be read as a metalink"),
        (b"<html>not found</html>", "lists uniref50.fasta.gz 0 times, not once"),
        (metalink("2024_06", {"uniref90.fasta.gz": CONTENT}), "lists uniref50.fasta.gz 0 times, not once"),
        (
            metalink("2024_06", {"uniref50.fasta.gz": b""}).replace(
                b"</files>", b'<file name="uniref50.fasta.gz"/></files>'
            ),
            "2 times",
        ),
        (metalink("../2024_06", {"uniref50.fasta.gz": CONTENT}), "the version of .* is '../2024_06'"),
        (metalink("2024_06", {"uniref50.fasta.gz": CONTENT}, size="-1"), "the size of .* is '-1'"),
        (metalink("2024_06", {"uniref50.fasta.gz": CONTENT}, md5=""), "the md5 of .* is ''"),
        (b" " * (2**22 + 1), "is longer than 4194304 bytes"),
    ],
)
def test_untrustworthy_metalink_is_rejected(uniprot: Server, text: bytes, problem: str) -> None:
    uniprot.files[f"{NOW}/RELEASE.metalink"] = text
    with pytest.raises(ReleaseError, match=problem):
        locate_release("current", base_url=uniprot.url)


def test_metalink_request_is_retried_if_the_server_is_busy(uniprot: Server, pauses: list[float]) -> None:
    uniprot.fail(Reply(status=503), Reply(drop_after=50), path=f"{NOW}/RELEASE.metalink")
    assert locate_release("current", base_url=uniprot.url).size == len(CONTENT)
    assert pauses == [1, 2]


# Archives


@pytest.mark.parametrize(
    ("files", "suffix"),
    [
        ({"uniref50.tar": tar({"uniref50.fasta.gz": CONTENT})}, ".fasta.gz"),
        ({"uniref50.tar.gz": tar({"./uniref50.fasta.gz": CONTENT}, "w:gz")}, ".fasta.gz"),
        ({"uniref50.fasta.gz": CONTENT}, ".fasta.gz"),
        ({"../../uniref50.fasta.gz": CONTENT}, ".fasta.gz"),
        ({"uniref50.tar": tar({"uniref50.fasta": gzip.decompress(CONTENT)})}, ".fasta"),
    ],
)
@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_fasta_in_the_archive_is_copied_unchanged(
    tmp_path: Path, files: dict[str, bytes], suffix: str, mode: str
) -> None:
    archive, folder = tmp_path / "uniref.tar", tmp_path / "data"
    archive.write_bytes(tar({"uniref90.tar": tar({"uniref90.fasta.gz": b"90"}), **files}, mode))
    folder.mkdir()
    path = extract_fasta(archive, folder, "2022_05")
    assert path == folder / f"uniref50_2022_05{suffix}"
    assert path.read_bytes() == (CONTENT if suffix.endswith("gz") else gzip.decompress(CONTENT))
    assert names(folder) == [path.name]
    assert names(tmp_path) == ["data", "uniref.tar"]


def test_plain_and_compressed_xml_give_the_same_file(tmp_path: Path) -> None:
    made = []
    for name, content in {"uniref50.xml": uniref_xml(), "uniref50.xml.gz": XML}.items():
        (tmp_path / "a.tar").write_bytes(tar({name: content}))
        made.append(extract_fasta(tmp_path / "a.tar", tmp_path, "2022_05").read_bytes())
    assert made[0] == made[1]


CLUSTERS = uniref_xml()


@pytest.mark.parametrize(
    ("xml", "problem"),
    [
        (uniref_xml(doctype='<!DOCTYPE UniRef50 [<!ENTITY a "x">]>'), "it has a DTD"),
        (uniref_xml(length=1), "UniRef50_P0CG48 has 76 residues, '77' by its length"),
        (CLUSTERS[:-20], "no element found|not well-formed|unclosed token"),
        (CLUSTERS.replace(b"sequence", b"peptide"), "UniRef50_P0CG48 has no sequence of"),
        (CLUSTERS.replace(b"sequence", b"peptide", 2).replace(b"member>", b"x>"), "UniRef50_P0CG48 has no sequence of"),
        (
            CLUSTERS.replace(b"sequence", b"peptide", 2).replace(b"</member>", b"<sequence/></member>"),
            "has no sequence of",
        ),
        (
            CLUSTERS[: CLUSTERS.rindex(b"<sequence")] + b"</representativeMember></entry></UniRef50>",
            "after 1 whole ones",
        ),
        (CLUSTERS.replace(b"entry id=", b"entry name="), "cannot be read"),
        (b"<UniRef50></UniRef50>", "after 0 whole ones"),
    ],
)
def test_malformed_xml_is_rejected(tmp_path: Path, xml: bytes, problem: str) -> None:
    (tmp_path / "a.tar").write_bytes(tar({"uniref50.tar": tar({"uniref50.xml.gz": gzip.compress(xml)})}, "w:gz"))
    with pytest.raises(ReleaseError, match=f"a.tar: .*({problem})"):
        extract_fasta(tmp_path / "a.tar", tmp_path, "2022_05")
    assert names(tmp_path) == ["a.tar"]


@pytest.mark.parametrize(
    ("archive", "problem"),
    [
        (tar({"uniref90.tar": b"90", "uniref50.txt": b"50"}, "w:gz"), "holds none of uniref50.fasta.gz"),
        (tar({"uniref50.fasta.gz": b""}, kind=tarfile.SYMTYPE), "holds none of"),
        (tar({"uniref50.fasta.gz": b""}, kind=tarfile.DIRTYPE), "holds none of"),
        (tar({"uniref50.tar": tar({"uniref50.tar": tar({"uniref50.fasta": b">"})})}), "holds none of"),
        (tar({"uniref50.tar": b"no tar at all"}), "cannot be read"),
        (b"", "cannot be read"),
        (ARCHIVE[: len(ARCHIVE) // 2], "cannot be read"),
        (tar({"uniref50.xml.gz": XML[: len(XML) // 2]}), "cannot be read"),
        (tar({"uniref50.xml.gz": XML[:-8] + b"\0" * 8}), "cannot be read"),
        (tar({"uniref50.xml.gz": XML[:20] + b"\xff" * 20 + XML[40:]}), "cannot be read"),
    ],
)
def test_archive_that_is_damaged_or_lacks_uniref50_leaves_nothing(tmp_path: Path, archive: bytes, problem: str) -> None:
    (tmp_path / "a.tar").write_bytes(archive)
    with pytest.raises(ReleaseError, match=f"a.tar: {problem}"):
        extract_fasta(tmp_path / "a.tar", tmp_path, "2022_05")
    assert names(tmp_path) == ["a.tar"]


def test_progress_ends_at_the_end_of_uniref50(tmp_path: Path) -> None:
    seen: list[tuple[int, int | None]] = []
    archive = tar({"uniref50.tar": INNER, "uniref90.tar": b"\0" * 1_000_000})
    (tmp_path / "a.tar").write_bytes(archive)
    assert read(extract_fasta(tmp_path / "a.tar", tmp_path, "2022_05", lambda *now: seen.append(now))) == EXPECTED
    assert {total for _, total in seen} == {len(archive)}
    assert len(INNER) < seen[-1][0] < len(INNER) + 200_000


def test_ctrl_c_while_reading_keeps_the_archive(uniprot: Server, tmp_path: Path) -> None:
    seen: list[int] = []

    def stop(now: int, _: int | None) -> None:
        seen.append(now)
        if len(seen) > 1 and now < seen[-2]:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch_release("2022_05", tmp_path, stop, uniprot.url)
    assert names(tmp_path) == ["uniref2022_05.tar.gz"]
    uniprot.seen.clear()
    assert read(fetch_release("2022_05", tmp_path, base_url=uniprot.url).path) == EXPECTED
    assert [path for path, *_ in uniprot.seen] == [f"{NOW}/RELEASE.metalink", f"{OLD}/RELEASE.metalink"]


def test_small_disk_is_detected_before_the_archive_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = tmp_path / "a.tar"
    with archive.open("wb") as stream:
        stream.truncate(170 * 10**9)  # a sparse file, which uses no disk space
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=9 * 10**9))
    needed = r"has 9\.0 GB free, 10\.0 GB needed for uniref50_2022_05\.fasta\.gz; make room, or choose another folder"
    with pytest.raises(ReleaseError, match=f"^{tmp_path}: {needed}$"):
        extract_fasta(archive, tmp_path, "2022_05", lambda *_: pytest.fail("read some of it"))
    assert names(tmp_path) == ["a.tar"]


def test_leftovers_of_a_killed_process_count_as_free_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.tar").write_bytes(tar({"uniref50.fasta.gz": b">"}))
    (tmp_path / "uniref50_2022_05.fasta.gz.part").write_bytes(bytes(10_240))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1))
    assert extract_fasta(tmp_path / "a.tar", tmp_path, "2022_05").read_bytes() == b">"


@pytest.mark.parametrize(
    ("name", "share", "suffix"),
    [
        ("uniref50.fasta.gz", 1.0, ".fasta.gz"),
        ("uniref50.fasta", 1.0, ".fasta"),
        ("uniref50.xml.gz", 0.85, ".fasta.gz"),
        ("uniref50.xml", 0.2, ".fasta.gz"),
    ],
)
def test_fasta_too_large_for_the_disk_is_not_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, share: float, suffix: str
) -> None:
    (tmp_path / "a.tar").write_bytes(tar({"uniref50.tar": tar({name: CONTENT})}))
    free = int(len(CONTENT) * share)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free - 1))
    with pytest.raises(ReleaseError, match=f"GB needed for uniref50_2022_05{suffix}; make room"):
        extract_fasta(tmp_path / "a.tar", tmp_path, "2022_05")
    assert names(tmp_path) == ["a.tar"]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    if "xml" in name:
        with pytest.raises(ReleaseError, match="cannot be read"):  # enough space, but the content is not XML
            extract_fasta(tmp_path / "a.tar", tmp_path, "2022_05")
    else:
        assert extract_fasta(tmp_path / "a.tar", tmp_path, "2022_05").read_bytes() == CONTENT


@pytest.mark.parametrize(("name", "share"), [("uniref50.xml.gz", 0.85), ("uniref50.xml", 0.2)])
def test_estimated_fasta_size_from_xml_is_sufficient_for_the_sample(tmp_path: Path, name: str, share: float) -> None:
    xml = sample_xml()
    content = gzip.compress(xml) if name.endswith("gz") else xml
    (tmp_path / "a.tar").write_bytes(tar({name: content}))
    made = extract_fasta(tmp_path / "a.tar", tmp_path, "2022_05").stat().st_size
    assert 0.8 < made / (len(content) * share) <= 1
