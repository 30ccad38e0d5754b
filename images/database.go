package images

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	bolt "go.etcd.io/bbolt"
	berrors "go.etcd.io/bbolt/errors"
	"golang.org/x/sys/unix"
)

// brokenExt is where a damaged database is kept, for whoever wants to know; the last one only.
const brokenExt = ".broken"

// openDatabase opens the database of a store, or makes it. One that is damaged is made anew of what can be read of it: what
// is lost is pulled again, which is better than a node that stays down (containerd#5854, #12302).
func openDatabase(path string, log *slog.Logger) (*bolt.DB, error) {
	if lostDatabase(path) {
		log.Error("database of images is lost; what it knew of is pulled again", "database", path)
	}
	if err := mendDatabase(path, log); err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	db, err := bolt.Open(path, 0o600, &bolt.Options{Timeout: time.Second, FreelistType: bolt.FreelistMapType})
	if errors.Is(err, berrors.ErrTimeout) {
		return nil, fmt.Errorf("%s is in use by another process: %w", filepath.Dir(path), errdefs.ErrFailedPrecondition)
	}
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", path, err)
	}
	return db, nil
}

// lostDatabase tells whether a database is gone, or empty, that had told of layers: these are there.
func lostDatabase(path string) bool {
	st, err := os.Stat(path)
	if err == nil && st.Size() > 0 || err != nil && !errors.Is(err, fs.ErrNotExist) {
		return false
	}
	layers, err := os.ReadDir(filepath.Join(filepath.Dir(path), layersDir))
	return err == nil && len(layers) > 0
}

func mendDatabase(path string, log *slog.Logger) error {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer f.Close()
	// bbolt's own lock: what another process is at must not be looked at.
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		return nil
	}
	if st, err := f.Stat(); err != nil || st.Size() == 0 {
		return err // bbolt makes one of an empty file
	}
	wrong, err := checkDatabase(f, nil)
	if err != nil || len(wrong) == 0 {
		return err
	}
	if errors.Is(wrong[0], berrors.ErrVersionMismatch) {
		return wrong[0]
	}
	kept, err := remakeDatabase(f, path)
	if err != nil {
		return fmt.Errorf("is damaged (%w), and cannot be made anew: %w", wrong[0], err)
	}
	log.Error("database of images is damaged and was made anew of what can be read of it; what is lost is pulled again",
		"database", path, "damaged", path+brokenExt, "what", wrong[0], "damages", len(wrong), "records", kept)
	return nil
}

// checkDatabase tells what is wrong with a database's file, and gives found, unless that is nil, all that is in it. Nobody
// may write to it meanwhile.
func checkDatabase(f *os.File, found func(bucket, key, value []byte)) (wrong []error, err error) {
	st, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if found == nil {
		found = func([]byte, []byte, []byte) {}
	}
	scanDatabase(f, st.Size(), found, func(err error) { wrong = append(wrong, err) })
	return wrong, nil
}

// remakeDatabase puts a database in place of a damaged one, with what can be read of that: so many records.
func remakeDatabase(damaged *os.File, path string) (kept int, err error) {
	fresh := path + ".new"
	if err := os.Remove(fresh); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return 0, err
	}
	db, err := bolt.Open(fresh, 0o600, nil)
	if err != nil {
		return 0, err
	}
	err = db.Update(func(tx *bolt.Tx) error {
		var failed error
		_, err := checkDatabase(damaged, func(bucket, key, value []byte) {
			if len(key) == 0 || len(key) > bolt.MaxKeySize || !isRecord(bucket, key, value) {
				return
			}
			b, err := tx.CreateBucketIfNotExists(bucket)
			if err == nil {
				err = b.Put(key, value)
			}
			kept++
			failed = errors.Join(failed, err)
		})
		return errors.Join(err, failed)
	})
	if err := errors.Join(err, db.Close()); err != nil {
		return 0, err
	}
	if err := os.Remove(path + brokenExt); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return 0, err
	}
	return kept, errors.Join(os.Link(path, path+brokenExt), os.Rename(fresh, path), syncDir(filepath.Dir(path)))
}

// isRecord tells what may be carried over: what has a digest must have that; the rest is read as each Open reads it.
func isRecord(bucket, key, value []byte) bool {
	for _, name := range buckets {
		if !bytes.Equal(bucket, name) {
			continue
		}
		return !bytes.Equal(name, docsBucket) || isDocument(digest.Digest(key), value)
	}
	return false
}

func isDocument(d digest.Digest, data []byte) bool {
	return d.Validate() == nil && d.Algorithm().FromBytes(data) == d
}
