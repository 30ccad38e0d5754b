package images

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	bolt "go.etcd.io/bbolt"
	"golang.org/x/sys/unix"

	"github.com/berth-run/berth/internal/step"
)

// Options say where a store lives and whom it tells.
type Options struct {
	// Root is the store's directory. It is made, and given mode 0700.
	Root string
	// Writable is a directory for prepared root file systems, where these are to be on another file system than the images.
	// It is made, given mode 0700, and the store's alone. "" has them in Root.
	Writable string
	// CertsD is the directory of registry configuration (HOST/hosts.toml, containerd's format), or several, separated by
	// colons, of which the first that has a registry's counts; "" for none.
	CertsD string
	// LocalWhenUnavailable answers a pull with the image that its reference means on this node, where there is one and the
	// registry could not be reached or was not fit to answer (ErrRegistryUnavailable). That is logged and counted. It means
	// that whoever may pull gets what an earlier pull opened with credentials of its own.
	LocalWhenUnavailable bool
	// KeepBlobs keeps the compressed layers of what is pulled from now on, so that it can be exported as it came; it takes
	// about half as much disk again.
	KeepBlobs bool
	// MaxLayerBytes and MaxLayerEntries are what a layer may unpack to; 0 for the defaults. Errors name them as settings,
	// maxLayerBytes and maxLayerEntries.
	MaxLayerBytes, MaxLayerEntries int64
	// MinPullRate is how many bytes a second a connection to a registry must bring, over half a minute; 0 for the default. Errors
	// name it minPullRate.
	MinPullRate int64
	// Log may be nil.
	Log *slog.Logger
	// Observe, if not nil, is told the end of each step of a pull.
	Observe func(step.Event)
}

// Store is the images of one node. Its methods may be called side by side.
type Store struct {
	root      string
	writable  string // of root file systems: root, or another directory
	rootDir   *os.File
	certsD    string
	local     bool
	keepBlobs bool
	log       *slog.Logger
	observe   func(step.Event)
	db        *bolt.DB
	pace      pace
	bounds    bounds
	space     space
	linger    time.Duration // of layers of pulls that failed

	ctx     context.Context
	stop    context.CancelFunc
	workers sync.WaitGroup
	trashed chan struct{}
	thrown  atomic.Uint64 // how often something was put into the trash

	track tracker
	// Bounds of all pulls together.
	layersAtOnce, connections slots
	early                     earlyWriter
	deletions                 quarantine

	pulls   shared[pullKey, *Image]
	unpacks shared[ChainID, *stagedLayer]

	// change lets one change of the store happen at a time. It is taken before mu, and held over I/O.
	change sync.Mutex
	// mu guards what follows and is never held over I/O, so that reads never wait for a pull.
	mu     sync.RWMutex
	images map[digest.Digest]*imageRecord
	refs   map[string]digest.Digest
	layers map[ChainID]*layerRecord
	// holds counts who, other than images, needs a layer: prepared root file systems, views and pulls under way.
	holds map[ChainID]int
	// retired are directories of layers that have another one now, by name, which something may be mounted from.
	retired map[string]retiredLayer
	// deleted is how much of what was thrown is deleted; emptied is closed when that changes.
	deleted uint64
	emptied chan struct{}
	rootfs  map[string]*rootfsRecord
	views   map[string]*viewRecord
	usage   map[string]Usage // of the writable layers, as last counted
	counts  counts
}

// Defaults of Options.
const (
	DefaultMaxLayerBytes   = 100 << 30
	DefaultMaxLayerEntries = 1_000_000
	DefaultMinPullRate     = 10 << 10
)

var discardLog = slog.New(slog.DiscardHandler)

// Names of the directories and files of a store.
const (
	dbName     = "meta.db"
	layersDir  = "layers"
	recordsDir = "records"
	blobsDir   = "blobs"
	rootfsDir  = "rootfs"
	viewsDir   = "views"
	tmpDir     = "tmp"
	trashDir   = "trash"
	emptyDir   = "empty" // a lower directory for what has no layers, and
	voidDir    = "void"  // another, since overlayfs refuses one directory twice
	recordName = "record.json"
)

// Open opens the store at o.Root, making it if need be, and undoes whatever a killed process left half done.
func Open(o Options) (*Store, error) {
	log := o.Log
	if log == nil {
		log = discardLog
	}
	root, err := filepath.Abs(o.Root)
	if err != nil || o.Root == "" {
		return nil, fmt.Errorf("image store: root %q: %w", o.Root, errdefs.ErrInvalidArgument)
	}
	writable := root
	if o.Writable != "" {
		if writable, err = filepath.Abs(o.Writable); err != nil {
			return nil, fmt.Errorf("image store: root file systems at %q: %w", o.Writable, errdefs.ErrInvalidArgument)
		}
	}
	if err := errors.Join(makeRoot(root), makeWritable(root, writable)); err != nil {
		return nil, fmt.Errorf("image store: %w", err)
	}
	rootDir, err := os.Open(root)
	if err != nil {
		return nil, fmt.Errorf("image store: %w", err)
	}
	db, err := openDatabase(filepath.Join(root, dbName), log)
	if err != nil {
		rootDir.Close()
		return nil, fmt.Errorf("image store: %w", err)
	}
	s := &Store{
		root: root, writable: writable, rootDir: rootDir, certsD: o.CertsD, keepBlobs: o.KeepBlobs, local: o.LocalWhenUnavailable, log: log, observe: o.Observe, db: db,
		pace: paceOf(cmp.Or(o.MinPullRate, DefaultMinPullRate)), bounds: bounds{bytes: cmp.Or(o.MaxLayerBytes, DefaultMaxLayerBytes), entries: cmp.Or(o.MaxLayerEntries, DefaultMaxLayerEntries)}, linger: lingerFor, space: space{dir: rootDir},
		layersAtOnce: newSlots(max(layersOfPull, 2*runtime.GOMAXPROCS(0))), connections: newSlots(maxConnections),
		trashed: make(chan struct{}, 1), emptied: make(chan struct{}),
		images: map[digest.Digest]*imageRecord{}, refs: map[string]digest.Digest{}, layers: map[ChainID]*layerRecord{},
		holds: map[ChainID]int{}, retired: map[string]retiredLayer{}, rootfs: map[string]*rootfsRecord{}, views: map[string]*viewRecord{}, usage: map[string]Usage{},
		counts: counts{asked: make(chan struct{}, 1), next: make(chan struct{})},
	}
	s.early.every = writeEvery
	s.deletions.on = withoutJournal(root)
	s.ctx, s.stop = context.WithCancel(context.Background())
	s.pulls.destroy = func(*Image) {}
	s.unpacks.destroy, s.unpacks.linger = s.discardStaged, s.lingers
	if err := s.recover(); err != nil {
		s.stop()
		db.Close()
		rootDir.Close()
		return nil, fmt.Errorf("image store: recover %s: %w", root, err)
	}
	s.workers.Go(s.emptyTrash)
	s.workers.Go(s.countWritables)
	s.discard()
	return s, nil
}

// Close cancels the pulls under way, waits for them and closes the store. Mounts stay.
func (s *Store) Close() error {
	s.stop()
	s.pulls.wait()
	s.unpacks.end()
	s.workers.Wait()
	return errors.Join(s.db.Close(), s.rootDir.Close())
}

// makeRoot makes the directories of a store. Mode 0700 keeps setuid files of layers and half-unpacked trees from other
// users of the host (CVE-2021-41103), so it holds for roots that were there before, too.
func makeRoot(root string) error {
	if err := makeDir(root, 0o700); err != nil {
		return err
	}
	for _, dir := range []string{layersDir, recordsDir, blobsDir, viewsDir, tmpDir, trashDir} {
		if err := makeDir(filepath.Join(root, dir), 0o700); err != nil {
			return err
		}
	}
	for _, dir := range []string{emptyDir, voidDir} {
		// Its mode is seen as that of the root directory of an image without layers.
		if err := makeDir(filepath.Join(root, dir), 0o755); err != nil {
			return err
		}
	}
	return spreadOut(filepath.Join(root, tmpDir))
}

func (s *Store) path(parts ...string) string {
	return filepath.Join(append([]string{s.root}, parts...)...)
}

// syncfs writes the file system of an open file to the disk.
func syncfs(f *os.File) error {
	conn, err := f.SyscallConn()
	if err != nil {
		return err
	}
	// Control keeps the descriptor from being closed, and its number from being another file's, meanwhile.
	var serr error
	if err := conn.Control(func(fd uintptr) { serr = unix.Syncfs(int(fd)) }); err != nil {
		return err
	}
	if serr != nil {
		return &os.PathError{Op: "syncfs", Path: f.Name(), Err: serr}
	}
	return nil
}

// syncDir makes renames into a directory durable.
func syncDir(path string) error {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return &os.PathError{Op: "open", Path: path, Err: err}
	}
	defer unix.Close(fd)
	if err := unix.Fsync(fd); err != nil {
		return &os.PathError{Op: "fsync", Path: path, Err: err}
	}
	return nil
}
